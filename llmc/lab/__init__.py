"""The kernel laboratory: the operations of the core, PyTorch's own and a user's variants, timed and checked."""
