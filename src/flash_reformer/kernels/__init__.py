"""How operations run fast. Each room has files with the stems and signatures of ``ops`` and never imports it."""
