"""The commands: arguments in, files and an exit status out."""
