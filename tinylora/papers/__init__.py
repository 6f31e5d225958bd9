"""What the papers say, recomputed: their numbers, their constructions and their qualitative claims.

    lora_numbers       every parameter count that the LoRA paper prints, beside its formula
    qlora_numbers      every number of the QLoRA paper that arithmetic or a quick run can reach, and its figure 6
    nf4_construction   how NF4 is built, value by value, and what it is optimal for
    codes_on_weights   every 4-bit code on the weights of a model
    normality          whether the weights of a model are normal
    subspaces          the similarity of subspaces, amplification, effective rank (LoRA §7)
    intrinsic          training in a random subspace (intrinsic dimension)
    ranks, switching   rank and task switching on the embedded model (LoRA Table 6, §4.2)
    claims             the qualitative claims, each on a toy
    verdict            what a recomputed number is called
    map                each statement of the papers, beside the code, the test and the notebook that decide it
    agreement          whether the map says what the two audits compute

A file computes, says and draws one thing. Nothing but the commands and the notebooks imports this room.
"""
