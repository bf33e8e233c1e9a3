"""Telemetry: what running runs say while they run. Reads run folders, never the processes that write them."""
