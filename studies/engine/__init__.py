"""The engine of all studies: networks are trained once, measured once, and every number is a record of one schema."""
