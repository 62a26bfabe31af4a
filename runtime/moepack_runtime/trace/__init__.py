"""Routing traces: their file, and recording one."""
