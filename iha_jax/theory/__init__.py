"""The paper's theorems as running code: superset, polynomial filters, CPM-3. `python -m iha_jax.theory` checks them."""
