"""The commands of the studies: arguments read, a study run, its results printed."""
