"""Running jobs on Ray: Ray Train for the workers, Ray Data for reading and decoding. Only this package imports ray."""
