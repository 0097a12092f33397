"""The report of a run, from the files of its run directory alone."""
