"""The stages of the GPU check, one module each: a function of a `StageContext` that runs in its own process."""
