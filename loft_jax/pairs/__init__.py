"""Which leaves of a pytree are the two factors of one low-rank adapter."""
