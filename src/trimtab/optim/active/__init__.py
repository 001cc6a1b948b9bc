"""Schedules of what trains when, one file each."""
