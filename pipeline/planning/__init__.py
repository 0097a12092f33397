"""The cost of a run on hardware that need not be here: memory, time and price, before anything is rented."""
