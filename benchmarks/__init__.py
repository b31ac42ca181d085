"""Measurements, one command each; nothing here runs in a test but the making of its inputs."""
