"""A Ray cluster: how to reach it, and how to have a function called on its machines that works in a folder here."""
