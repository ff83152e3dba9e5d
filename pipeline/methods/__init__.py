"""Self-supervised methods, one file each; `pipeline.registry.METHODS` imports them at the first look-up."""
