"""The mixture of tasks: samplers, and the schedule and shape budget that follow from them."""
