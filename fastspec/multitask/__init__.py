"""Many tasks on one model: `fastspec.add_task`, `load_tasks`, `tasks` and the layer `task_linear`."""
