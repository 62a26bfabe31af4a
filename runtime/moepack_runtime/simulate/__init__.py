"""What a cache would have done on a trace, in numbers and figures."""
