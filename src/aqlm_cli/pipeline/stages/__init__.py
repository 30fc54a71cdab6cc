"""One command, one module, one function: settings and events in, artifacts and a record out. Orchestration only."""
