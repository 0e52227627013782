"""CPM-3 and polynomial filters as learned tasks: how many heads of MHA and of IHA training needs."""
