"""The commands, one file each: ``<name>_command.py`` with a click command named ``command``."""
