"""The plan of a run: sites, parameters, memory, traffic and steps, made without weights."""
