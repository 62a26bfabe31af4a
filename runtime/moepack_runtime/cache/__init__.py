"""Which records are in memory, and where: slots and what decides over them, or mapped files."""
