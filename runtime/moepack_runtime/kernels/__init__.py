"""Computing with packed weights. ``reference`` is plain torch and right on every device."""
