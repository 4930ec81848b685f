"""Slicing, by what is cut: neurons, values, queries with their keys. `moments`: what they share."""
