"""The command line: flags to configs, the commands, the glue that starts a server. Never imports torch."""
