"""The command line: flags to configs, the commands, and the glue that starts a server. Imports torch never."""
