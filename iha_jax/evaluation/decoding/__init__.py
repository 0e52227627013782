"""Cached decoding: what a token needs of those before it is kept, so that each new token costs one token's work.

`mechanisms.py` has one class a layer kind, `transformer.py` the whole model, `drawing.py` how a token is chosen,
`generator.py` how texts are continued.
"""
