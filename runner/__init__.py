"""The `oslo` command: checks a config, renders and submits it, follows the job. Never imports torch."""
