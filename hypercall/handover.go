package hypercall

import "errors"

// A HandoverDomain is a Domain whose Shares and Waiters can pass to another process of the
// same domain, while the peer goes on to use the pages and the event channels. The process
// that has them makes an [Offer] and sends it to the other one, which adopts it and then
// says so. Both hold the objects in between, and neither end of a process ends them as long
// as the other lives. Only one process at a time may use them.
type HandoverDomain interface {
	Domain

	// Offer describes shares and waiters, with all open ports of these, to another process.
	// No goroutine may be in a Wait of the waiters, nor may they be in a Group. Nothing has
	// changed until [Offer.Give]. At a time there is one Offer of a share or waiter.
	Offer(shares []*Share, waiters []Waiter) (*Offer, error)

	// Adopt makes the objects of an Offer usable in this process, in the order in which they
	// were offered. An Offer is adopted once. onThread says, by waiter, whether its Wait is
	// to block the thread as that of a [ThreadDomain]'s; a missing one is false. Adopt does
	// not take files over. state and files come from another process and are checked: an
	// error leaves nothing behind.
	Adopt(state []byte, files []File, onThread []bool) (*Adopted, error)
}

// ErrNoOffer is returned by Adopt for an Offer that this domain has not made, or that was
// adopted or withdrawn before.
var ErrNoOffer = errors.New("no such offer of this domain")

// An Offer is what another process of the domain needs to adopt shares and waiters.
type Offer struct {
	State []byte // for Adopt
	Files []File // for Adopt, in this order; the Offer closes them

	give, withdraw func()
}

// NewOffer is for implementations of [HandoverDomain]. One of give and withdraw runs, once.
func NewOffer(state []byte, files []File, give, withdraw func()) *Offer {
	return &Offer{state, files, give, withdraw}
}

// Give leaves the objects to the process that has adopted them: from now on [Share.End] and
// Waiter.Close only let go of them in this process, and nothing else may be done with them.
func (o *Offer) Give() { o.settle(&o.give) }

// Withdraw ends the Offer: the objects stay with this process, and nobody can adopt them
// any more. After Give it does nothing.
func (o *Offer) Withdraw() { o.settle(&o.withdraw) }

func (o *Offer) settle(f *func()) {
	run := *f
	o.give, o.withdraw = nil, nil
	for _, f := range o.Files {
		f.Close()
	}
	o.Files = nil
	if run != nil {
		run()
	}
}

// An Adopted is what [HandoverDomain].Adopt returns. Its shares and waiters are like those
// that the domain has made itself, unless Drop is called.
type Adopted struct {
	Shares  []*Share
	Waiters []AdoptedWaiter

	drop func()
}

// An AdoptedWaiter is a Waiter with the ports that were open on it, in no order.
type AdoptedWaiter struct {
	Waiter
	Ports []Port
}

// NewAdopted is for implementations of [HandoverDomain]. drop runs at most once.
func NewAdopted(shares []*Share, waiters []AdoptedWaiter, drop func()) *Adopted {
	return &Adopted{shares, waiters, drop}
}

// Drop lets go of the objects without ending them: they stay with the process that has
// offered them.
func (a *Adopted) Drop() {
	if drop := a.drop; drop != nil {
		a.drop = nil
		drop()
	}
}
