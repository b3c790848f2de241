"""The tour behind `jgd demo`: one file for each section, each a claim that is computed, checked and drawn."""
