"""Random losses out of the primitives that have rules, and some that have none: see `programs.writer`."""
