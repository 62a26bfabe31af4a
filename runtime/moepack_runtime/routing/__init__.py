"""Finding routers, and seeing or changing what they choose."""
