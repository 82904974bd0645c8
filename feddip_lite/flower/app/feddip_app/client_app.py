"""What a node does with a message; see `feddip_lite.flower.client`."""

from flwr.clientapp import ClientApp

from feddip_lite.flower.client import query, tell, train

app = ClientApp()
app.query()(query)
app.train()(train)
app.train("tell")(tell)
