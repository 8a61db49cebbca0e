"""A model that is run block by block, from its checkpoint and from where an interrupted run was."""
