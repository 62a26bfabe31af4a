"""From a checkpoint to a pack: sources, the plan, and carrying it out expert by expert."""
