"""Tasks: data, their corruption, and the truth about it.

A task is one function in a file of its own, returning a checked ``TaskData``, and one YAML file
that names it.

    task                what a task hands to the rest: ``Task``, ``TaskData``
    positions           any data set, with each example's position: ``with_index``
    batches             its examples in batches ``(x, y, index)``
    source              the clean data that a task samples from
    image_sets          those that are to be had by name: digits, MNIST, CIFAR-10
    digits mnist cifar  their files and tasks of uniform flips
    cifar10n            CIFAR-10 with the labels of people
    natural             MNIST's own label errors, as people judged them
    mislabel            uniform flips of any source
    structured          flips between look-alikes, of odd images, in a long tail
    backdoor            a trigger with the attacker's label
    duplicates          flips that come several times
    memorisation        correct examples that are atypical, or of a rare class
    corruption          how labels are flipped
    sampling            which examples are drawn, and by which random streams
    groups              sets of examples worth an influence of their own
    reference_model     which images are hard: a model that no run trains
    pixels              images to network inputs
    views               what a person is shown of an example: image, text, row of a table
    downloads, idx      data files: found, verified, fetched at need, read
"""
