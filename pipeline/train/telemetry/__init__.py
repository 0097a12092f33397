"""Records of the steps: files, alarms, progress display, profiler and metric writers."""
