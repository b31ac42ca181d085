"""Measurements, one command each. Tests run only the code that makes their inputs."""
