"""Families of commands of the command line, one module a family; each has add(commands), which adds its parsers."""
