"""Workers: a Celery process that claims steps, and the engine, its child, that owns the device and does them."""
