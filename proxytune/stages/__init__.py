"""One function a stage, `run(settings) -> result`: what `proxytune <stage>` does, callable from Python as well."""
