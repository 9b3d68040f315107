"""FedRouter as a library: enrol, train two rounds, route a text. The README shows this file."""

import numpy as np

from fedrouter_jax import experiment
from fedrouter_jax.presets import smoke
from fedrouter_jax.types import View

prepared = experiment.prepare(smoke())  # the model, rows dealt to clients, the jitted round
embeddings = experiment.embed_rows(prepared)  # by the frozen base model
enrolment = experiment.enroll(prepared, embeddings)  # local clusters, global centroids
state = experiment.start(prepared, enrolment)  # a pytree: round, adapters, table, router

rows = experiment.members(prepared, enrolment)
for t in (1, 2):
    work, batch = experiment.round_inputs(prepared, rows, t)  # lanes and their packed rows
    state, record = experiment.train_round(prepared, state, work, batch)
    print(f"round {record['round']}: loss {record['loss']:.3f}, {record['bytes_up']} bytes up")

texts = ["Facts: White Plaza, town, Newport\nTurn the facts into one sentence."]
points = experiment.embed_texts(prepared, texts)
weights = prepared.strategy.route(state, np.zeros(1, int), View(points), "global")
print("adapter", int(weights[0].argmax()))
