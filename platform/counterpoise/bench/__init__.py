"""`counterpoise bench`: measurements on this machine. Both sides of a comparison in one command, in turns."""
