import logging

# PEFT imports it, and on some CPUs it asks for a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
