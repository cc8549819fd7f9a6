"""What the commands share: flags, output, errors and exit codes."""
