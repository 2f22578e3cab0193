"""What a GPU does with this code, in one prepared run of under eight minutes: bash benchmarks/gpu.sh

A card is lent for minutes, so everything is in a list, the most important first, and what no longer fits is named in
the results: tests/gpu; harvests of Llamas of random weights beside the same forward pass without sites and its matrix
products alone; the TopK step beside the encoder's product alone; copies to and from the card. Needs torch, transformers
and numpy: nothing here imports storage, workers or jobs, nor what only those need (a test holds this).

`plan` has the list, `worker` the process that measures, `results` what is written.
"""
