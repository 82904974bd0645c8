"""The server: all rounds of one run; see `feddip_lite.flower`."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .strategy import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration that the run's settings hold."""
    serve(grid, context.run_config)
