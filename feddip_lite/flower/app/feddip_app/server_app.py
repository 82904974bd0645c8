"""The server: all rounds of one run; see `feddip_lite.flower`."""

from feddip_lite.strategy import serve
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration that the run's settings hold."""
    serve(grid, context.run_config)
