"""The built-in factorizations: one file each, found by listing this folder."""
