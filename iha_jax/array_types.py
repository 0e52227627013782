"""Shape-and-dtype annotations: jaxtyping's where it is installed, else names that mean "an array".

Only annotations depend on this, so `iha_jax.ops` and `iha_jax.model` import with jax, flax and numpy alone.
"""

from typing import TYPE_CHECKING, Any

from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:

        class _AnyArray:
            def __class_getitem__(cls, _: Any) -> type[Array]:
                return Array

        Float = Int = _AnyArray

__all__ = ["Array", "Float", "Int"]
