"""Updates, one file each: how a gradient becomes a step. `active` holds schedules: what trains when."""
